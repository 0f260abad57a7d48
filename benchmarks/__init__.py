"""Comparisons with what a user would pick instead."""
