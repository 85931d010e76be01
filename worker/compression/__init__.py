"""Products of smaller layers, and the 8-bit file; imports worker.pruning, data, verification, app.compression."""
