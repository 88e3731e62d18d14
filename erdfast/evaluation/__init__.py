"""Measures of generated images: what they need are images and features, never a model."""

from erdfast.evaluation.digits import DigitsReport, digits_report
from erdfast.evaluation.frechet import FeatureStatistics, frechet_distance

__all__ = ["DigitsReport", "FeatureStatistics", "digits_report", "frechet_distance"]
