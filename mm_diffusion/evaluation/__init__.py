"""Figures of merit for generated clips."""
