"""From artefacts to what people read: one table, figures, one page."""
