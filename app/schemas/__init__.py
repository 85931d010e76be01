"""The shapes of answers: built by whoever answers, dumped as they are. Imports the job language only."""
