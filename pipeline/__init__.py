"""Stages as plain functions, and what they are made of; no Ray."""
