"""Things to try that need no data of your own."""
