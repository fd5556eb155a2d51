"""Preference rows of answers, made by a vision-language model: one method per file, each a function of one row."""
