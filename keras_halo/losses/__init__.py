from keras_halo.losses.halo_loss import HALOLoss, halo_loss

__all__ = ["HALOLoss", "halo_loss"]
