"""Text: refusal markers, redaction of secrets, escaping for HTML and Markdown."""
