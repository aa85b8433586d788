from keras_halo.callbacks.ood_monitor import OODMonitor

__all__ = ["OODMonitor"]
