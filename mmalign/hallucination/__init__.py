"""Benchmarks of what vision-language models say that is not there: their files and their rules."""
