"""The web pages: HTML made on the server from the documents that the API answers with. Imports nothing of ours."""
