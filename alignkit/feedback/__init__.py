"""The feedback room: answers, critiques, revisions and labels that a model gives; it writes rows and trains nothing."""
