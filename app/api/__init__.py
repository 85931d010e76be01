"""The API over HTTP: guards, bodies, answers. Imports all of app but web, main, serve and migrate."""
