"""Whether delivered files compute what was trained; imports worker.evaluation, export and network, never training."""
