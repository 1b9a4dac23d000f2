from dino.augmentation.multicrop import MultiCrop
from dino.augmentation.preview import preview
from dino.augmentation.views import PhotometricParameters, ViewBatch

__all__ = ["MultiCrop", "PhotometricParameters", "ViewBatch", "preview"]
