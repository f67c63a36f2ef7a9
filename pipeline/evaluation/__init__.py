"""Evaluation of a trained model beyond its accuracy: calibration, confusion, average precision, mistakes."""
