"""Checks of what users send that know nothing of networks or jobs; imports nothing of ours but `app.errors`."""
