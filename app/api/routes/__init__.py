"""The routes, a file per noun. Imports whatever app.api may, and web and weights."""
