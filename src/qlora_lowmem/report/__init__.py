"""Tables, charts and the page, made of what was recorded; nothing is computed here that a record does not say."""
