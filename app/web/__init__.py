"""The web page: HTML made on the server from the same documents that the API answers with."""
