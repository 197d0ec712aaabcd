"""The exercises in the order in which they are read: which function, what judges it, and what helps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Station:
    """An exercise."""

    title: str
    function: str  # module and name
    read: str  # before
    tests: str  # the file of the tests that judge it
    chosen: str  # which of them, as pytest's -k takes it
    shown: str  # what is made with it when it passes: "edit", "pair" or "training" (show.py)
    hints: tuple[str, str, str]  # of rising size


STATIONS = (
    Station(
        "Add noise", "diffusion.NoiseSchedule.add_noise", "the head of diffusion.py; Ho et al. 2020, Eq. 4",
        "tests/test_diffusion.py", "add_noise", "edit", (
            "Each example of the batch has a time t of its own, and so an abar_t of its own.",
            "`self.alphas_cumprod[t]` is [B]; it needs three more dimensions to be multiplied with [B, C, H, W].",
            "With abar = self.alphas_cumprod[t][:, None, None, None]: abar.sqrt() weighs z. The noise gets what keeps "
            "the variance at 1.",
        )),
    Station(
        "Attention", "attention.reference", "attention.py; Vaswani et al. 2017, Eq. 1",
        "tests/test_attention.py", "reference or large_logits", "edit", (
            "Three lines: logits from q and k, a map from the logits, an average of the values by the map.",
            "The logits are q k^T, scaled by one over the root of the head width. What of the map must sum to 1?",
            "logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5; the softmax is over the keys, the last dimension; "
            "then map @ v.",
        )),
    Station(
        "The time as waves", "unet.timestep_embedding", "unet.py, its last function; Vaswani et al. 2017, Sec. 3.5",
        "tests/test_unet.py", "timestep_embedding", "edit", (
            "One number becomes many, by waves: fast ones tell near times apart, slow ones far times.",
            "width / 2 frequencies, falling in a geometric series: 10000^(-i / (width / 2)) for i = 0, 1, ...",
            "angles = t.float()[:, None] * frequencies is [B, width / 2]; torch.cat the cosines and the sines.",
        )),
    Station(
        "Euler ancestral sampling", "diffusion.euler_ancestral", "diffusion.py: its head, ancestral_split",
        "tests/test_diffusion.py", "euler_ancestral", "edit", (
            "A loop over pairwise(sigmas.tolist()): the noise level of a step, and the next one.",
            "(x - denoised) / sigma is the noise, and the slope dx / dsigma. ancestral_split says how far to go.",
            "denoised = denoise(x, sigma); the callback, if there is one; x + slope * (sigma_down - sigma); then "
            "+ next(noise) * sigma_up, but not after the last step, where next_sigma is 0.",
        )),
    Station(
        "DDIM", "diffusion.euler", "diffusion.py; Song et al. 2021, Eq. 13: Euler's method, in x = z_t / sqrt(abar_t)",
        "tests/test_diffusion.py", "euler and not ancestral and not karras", "edit", (
            "It is Euler ancestral sampling without the fresh noise.",
            "The slope at sigma is (x - denoised) / sigma; a step changes sigma by next_sigma - sigma.",
            "for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())): denoise, call the callback with "
            "(step, sigma, denoised), then x = x + slope * (next_sigma - sigma).",
        )),
    Station(
        "Guidance by the text, Eq. 2", "stable_diffusion.StableDiffusion.denoiser", "Sec. 3.2.1; Ho and Salimans 2022",
        "tests/test_stable_diffusion.py", "guidance or diffusers", "pair", (
            "The UNet predicts twice, with the empty text and with the text, in one batch of 2 B rows.",
            "Return self.schedule.denoiser(guided), where guided(z, t) -> eps. From eps_null go `guidance` times the "
            "way to eps_text.",
            "contexts = torch.cat([self.null_text.expand_as(text), text]); self.predict_eps(z.repeat(2, 1, 1, 1), t, "
            "contexts, attend) runs the UNet, and .chunk(2) takes its prediction apart, null first.",
        )),
    Station(
        "Guidance by image and text, Eq. 3", "ip2p.guided_eps", "Sec. 3.2.1; ip2p.InstructPix2Pix.denoiser calls it",
        "tests/test_ip2p.py", "eq_3", "edit", (
            "Begin at the prediction without any condition, and add two directions.",
            "The image's direction leads from no condition to the image alone, the text's from there to both.",
            "eps_null + image_guidance * (eps_image - eps_null) + ...; with both scales 1 the sum is eps_full.",
        )),
    Station(
        "Dropping the conditions", "ip2p.drop_conditions", "Sec. 3.2.1, the paragraph before Eq. 3",
        "tests/test_ip2p.py", "dropping", "training", (
            "One uniform number u an example decides; there are three windows of 5 % each.",
            "u < 0.05: the text is lost; 0.05 <= u < 0.10: both; 0.10 <= u < 0.15: the image. Let two of them overlap.",
            "no_text = u < 0.10; no_image = (u >= 0.05) & (u < 0.15). torch.where puts null_text in; a lost image is "
            "zeros.",
        )),
    Station(
        "The loss, Eq. 1", "ip2p.loss", "Sec. 3.2, Eq. 1; train.train calls it",
        "tests/test_ip2p.py", "eq_1", "training", (
            "Drop conditions, add noise, predict the noise, compare.",
            "The UNet takes the noisy latent and the input image's latent as one tensor of twice the channels, in this "
            "order: torch.cat([...], dim=1).",
            "Noise `latent`, never `image_latent`: z_t = schedule.add_noise(latent, noise, t). The square of eps - "
            "noise is averaged over dimensions 1, 2 and 3, and an example keeps its own value.",
        )),
    Station(
        "New input channels of zeros", "formats.weights.extend_input", "Sec. 3.2: the first layer's new channels",
        "tests/formats/test_checkpoint.py", "extending", "training", (
            "Make a UNet with the new configuration, give it all the old weights, and only conv_in's is another one.",
            "On the meta device (`with torch.device(\"meta\")`) a network has no memory; load_state_dict(weights, "
            "assign=True) gives it tensors. nn.functional.pad adds zeros to conv_in.weight, [C, 4, 3, 3].",
            "pad's numbers come in pairs, last dimension first: (0, 0, 0, 0, 0, new) adds behind the input channels. "
            "UNet(replace(unet.config, **inputs)) is the new network; return it, as .train(unet.training) as the old.",
        )),
    Station(
        "The mode of the latent", "stable_diffusion.LatentDiffusion.encode_image", "the head of vae.py; Sec. 3.2",
        "tests/test_ip2p.py", "unscaled_mode", "edit", (
            "self.vae.encode gives a distribution (vae.Gaussian), of which one latent is taken.",
            "The image to edit is not drawn: take its most likely latent. And is this one scaled?",
            "self.vae.encode(x).mode().float(), without vae.config.scaling; x first goes to self.device, in the number "
            "format of self.vae.quant_conv.weight.",
        )),
    Station(
        "Which token is which", "align.refine", "align.py; Hertz et al. 2022, Sec. 3.2",
        "tests/test_align.py", "refin or cut_off", "pair", (
            "tokenizer([text])[0] are a caption's ids; the first count_tokens(tokenizer, text) of them count.",
            "common_subsequence(source_ids, target_ids) gives the places (i, j) of tokens that both have: there the "
            "mapper [L, L] and `shared` [L] are 1.",
            "join_ends(mapper, ours, theirs) maps the ends and the padding; in `shared`, these are 1, too: from the "
            "target's count on. Return (mapper, shared).",
        )),
    Station(
        "Borrowing a map", "p2p.PairControl.of_first", "the head of p2p.py; PairControl; Sec. 3.1.2",
        "tests/test_p2p.py", "a_layer_equals or a_pair_equals", "pair", (
            "The batch has four parts, x.chunk(4): null before, null after, before, after.",
            "The second image's q (or k) becomes the first one's, for the pairs that self.active names.",
            "after = torch.where(active, before, after) with active = self.active[:, None, None, None]; the same for "
            "null_after and null_before; then torch.cat again.",
        )),
    Station(
        "Directional similarity", "clip_image.CLIP.edit_similarities", "Sec. 3.1.2; Gal et al. 2022",
        "tests/test_clip.py", "small_clip", "pair", (
            "self.image.features and self.text.features give unit vectors [B, D] of images and of captions.",
            "An edit is a direction: from the feature before to the feature after, in images and in texts. "
            "F.cosine_similarity compares.",
            "clip_sim_dir = F.cosine_similarity(image1 - image0, text1 - text0); clip_sim_0 and clip_sim_1 compare "
            "image and caption, clip_sim_image both images.",
        )),
    Station(
        "The filter", "dataset.Filter.refused_by", "Sec. 3.1.2; the fields of dataset.Filter",
        "tests/test_dataset.py", "papers_thresholds", "pair", (
            "Three thresholds, each a field of its own: of image_text both images must reach it.",
            "What exactly reaches its threshold is kept. NaN is not; and it is never >= nor < anything.",
            "min(clip_sim_0, clip_sim_1) stands against self.image_text, clip_sim_image against self.image_image, "
            "clip_sim_dir against self.direction; return the names where `not value >= threshold`.",
        )),
    Station(
        "The moving average", "training.runs.update_ema", "Appendix C: EMA; train.fit calls it",
        "tests/training/test_runs.py", "moving_average", "training", (
            "ema = decay * ema + (1 - decay) * weights, for every name.",
            "Both are {name: tensor}; the average is changed in place, the weights are not.",
            "for name, value in ema.items(): value.lerp_(weights[name].to(value.device), 1 - decay).",
        )),
    Station(
        "LoRA", "formats.lora.LowRank.forward", "the head of formats/lora.py; Hu et al. 2021",
        "tests/formats/test_lora.py", "at_first or merging", "training", (
            "The weight stays as it is, and a product of two narrow matrices is added.",
            "self.b is [out, rank], self.a is [rank, all the rest]: which product is [out, all the rest]?",
            "weight + self.b @ self.a, brought to the weight's own shape, which for a convolution has four dimensions.",
        )),
)  # fmt: skip
