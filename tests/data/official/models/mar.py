"""Stands in for the official code where that is not: its interface, around our own model."""

from types import SimpleNamespace

import torch

import maskrl
from workbench.released import mar_name


class MAR(maskrl.MAR):
    def __init__(self, **sizes):
        settings = maskrl.Settings(
            image_size=sizes["img_size"],
            patch=sizes["patch_size"],
            width=sizes["encoder_embed_dim"],
            depth=sizes["encoder_depth"],
            decoder_depth=sizes["decoder_depth"],
            heads=sizes["encoder_num_heads"],
            buffer=sizes["buffer_size"],
            head_width=sizes["diffloss_w"],
            head_depth=sizes["diffloss_d"],
            predicts="eps",
            x_0_limit=0.0,
            denoise_steps=int(sizes["num_sampling_steps"]),
        )
        super().__init__(settings, range(sizes["class_num"]), "teacher", sizes["vae_embed_dim"])
        self.diffloss = SimpleNamespace(net=self.head)

    def load_state_dict(self, weights):
        own = {mar_name(name): name for name, _ in self.named_parameters()}
        super().load_state_dict({own[name]: value for name, value in weights.items()})

    def forward_mae_encoder(self, tokens, mask, classes):
        labels = torch.tensor([0, self.num_classes]).cuda()
        assert torch.equal(torch.cat([self.class_emb.weight, self.fake_latent])[labels], classes)
        return tokens, mask.bool(), labels

    def forward_mae_decoder(self, encoded, mask):
        return self.context(*encoded)

    def sample_tokens(self, bsz, num_iter, cfg, cfg_schedule, labels):
        assert cfg_schedule == "linear"
        sampling = maskrl.Sampling(num_iter, guidance=cfg, order="random")
        return maskrl.generate(self, labels.cuda(), sampling)
