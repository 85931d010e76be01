"""One job from its description to its files. Imports every room of the worker but supervision, and of app planning and below."""
