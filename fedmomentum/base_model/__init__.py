"""The frozen pretrained model.

Find it, identify it by its content, load it, and hold its adapted weights in float32.
"""
