"""From what was uploaded or downloaded to a packed data set: one folder of arrays that a worker maps into memory."""
