"""From a call to a device and back: validation, dispatch, gradients, and operators for torch.compile."""
