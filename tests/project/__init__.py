"""What is shipped and written: the commands, the package, the documents, the examples, the layout."""
