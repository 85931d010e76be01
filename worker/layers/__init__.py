"""What the worker makes of each layer: torch module, ONNX operators, Python source; imports only `app.network`, torch and numpy."""
