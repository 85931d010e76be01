"""Networks as data and what can be said of them without torch; imports only `app.errors` and `app.validation`."""
