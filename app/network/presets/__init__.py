"""Networks by name: functions from input shape, class count and width to layers as plain JSON; imports only `app.errors`."""
