"""Explaining where it is needed: an ONNX graph, a folder of photos, millions of them, a web service."""
