from dino.evaluation.copy_detection import CopyDetectionEvaluator
from dino.evaluation.features import evaluation_mode, extract_features, normalized
from dino.evaluation.inputs import EvaluationInputs, Evaluator, FeatureInputs, evaluation_folder
from dino.evaluation.knn import KNNResult, knn_classify, nearest_neighbours
from dino.evaluation.knn_evaluator import KNNEvaluator
from dino.evaluation.label_free import LabelFreeEvaluator, RankEvaluator, effective_rank
from dino.evaluation.linear_evaluator import LinearEvaluator, probe_features
from dino.evaluation.linear_probe import LinearProbes, train_probes
from dino.evaluation.pictures import PicturesEvaluator
from dino.evaluation.retrieval import RetrievalEvaluator
from dino.evaluation.validation_loss import ValidationLossEvaluator
from dino.evaluation.video_segmentation import VideoSegmentationEvaluator

__all__ = [
    "CopyDetectionEvaluator",
    "EvaluationInputs",
    "Evaluator",
    "FeatureInputs",
    "KNNEvaluator",
    "KNNResult",
    "LabelFreeEvaluator",
    "LinearEvaluator",
    "LinearProbes",
    "PicturesEvaluator",
    "RankEvaluator",
    "RetrievalEvaluator",
    "ValidationLossEvaluator",
    "VideoSegmentationEvaluator",
    "effective_rank",
    "evaluation_folder",
    "evaluation_mode",
    "extract_features",
    "knn_classify",
    "nearest_neighbours",
    "normalized",
    "probe_features",
    "train_probes",
]
