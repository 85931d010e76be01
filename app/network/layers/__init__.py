"""One class per layer of the job language: shapes, tensors, cost; imports only `app.errors` and `app.validation`."""
