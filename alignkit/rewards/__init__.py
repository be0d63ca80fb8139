"""What scores an answer: classifiers, functions, judges and the toy world."""
