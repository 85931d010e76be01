"""The files that a job delivers; imports only `worker.network`, `worker.layers`, `app.network` and `app.compression`."""
