"""The training loop and its parts. Imports evaluation, journal, network, precision; of app network, pruning and spec."""
