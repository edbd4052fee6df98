"""Leaving experts out: functions from one routing to another, and attaching them to a model."""
