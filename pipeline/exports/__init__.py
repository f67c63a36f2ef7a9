"""Trained models for use elsewhere: safetensors with a config, timm's layout, ONNX, and torch.export."""
