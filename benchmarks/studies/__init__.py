"""Commands that answer one question each, with its lines in results/ and mostly a page in docs/."""
