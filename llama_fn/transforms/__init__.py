"""What takes a pure function and gives another: compilation with donated arguments."""
