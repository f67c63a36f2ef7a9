"""Classes and labels of a dataset: lists of classes, label files, and how classes are mixed."""
