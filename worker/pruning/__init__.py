"""Pruning of trained tensors: scores, masks, surgery; imports worker.training and latency, app.pruning and below."""
