from keras_halo.losses.halo_contrastive_loss import HALOContrastiveLoss
from keras_halo.losses.halo_loss import HALOLoss, halo_loss

__all__ = ["HALOContrastiveLoss", "HALOLoss", "halo_loss"]
