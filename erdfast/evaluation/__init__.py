"""Measures of generated images: what they need are images and features, never a model that draws them."""

from erdfast.evaluation.digits import DigitsReport, digits_report
from erdfast.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance
from erdfast.evaluation.inception_score import InceptionScore, inception_score
from erdfast.evaluation.measure import METRICS
from erdfast.evaluation.precision_recall import PrecisionRecall, precision_recall

__all__ = [
    "METRICS",
    "DigitsReport",
    "FeatureStatistics",
    "Gaussian",
    "InceptionScore",
    "PrecisionRecall",
    "digits_report",
    "frechet_distance",
    "inception_score",
    "precision_recall",
]
