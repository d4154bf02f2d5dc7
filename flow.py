"""Rectified flow: the maths between Gaussian noise and CLIP features (BLIP3-o, section 3.2), for any velocity network.

    x_t = t x1 + (1 - t) x0        x0 ~ N(0, I) is noise at t = 0, x1 is data at t = 1
    v   = dx_t/dt = x1 - x0        what the network learns: loss = mean |velocity(x_t, t, cond) - v|^2
    x_{t+dt} = x_t + dt * velocity(x_t, t, cond)                    sampling: Euler steps from t = 0 to t = 1

A loss says nothing about a wrong direction in time or a wrong sign until pictures come out, and every code base picks
its own. The directions that a reader of this one will meet:

                                  noise is at    data is at    the network predicts         as seen from here
    here, and the paper           t = 0          t = 1         v = x1 - x0  (data - noise)   t, v
    official BLIP3-o code         time 1000      time 0        noise - data                  1000 (1 - t), -v
    SD3, FLUX                     t = 1          t = 0         noise - data                  1 - t, -v
    SiT and Lumina-Next code      t = 0          t = 1         data - noise                  t, v

Everything here speaks the first row. dit.py alone translates to the second, so that official weights fit.
Shapes: B batch, `...` any further dimensions (here C x H x W), t is (B,) in fp32.
"""
import torch


def shift_time(t, shift):
    """t' = t / (t + shift (1 - t)): moves times toward noise for shift > 1; its inverse is shift_time(t', 1 / shift).

    shift = 1 is the identity: the paper, and what official weights need. Why shift at all: the features of one picture
    repeat each other (large areas share a colour or a texture), so their average survives noise that drowns each single
    one. At t = 0.05 the noisy input of a small model already gives the picture away, and the prompt is of use only
    below, where uniform t spends 5 % of training and 2 of 30 sampling steps. A network trained so learns to ignore its
    prompt. The more redundant dimensions, the more noise it takes to hide the signal: SD3 (section 5.3.2) derives this
    formula for larger pictures (with sigma = 1 - t it reads sigma' = shift sigma / (1 + (shift - 1) sigma)), RAE
    (arXiv 2510.11690) uses it for features like ours. Train and sample with the same shift.
    """
    if shift <= 0:
        raise ValueError(f"shift must be positive, not {shift}")
    return t / (t + shift * (1 - t))


def sample_t(n, shift=1.0, generator=None, device=None):
    """n training times in [0, 1), (n,) fp32: uniform, then shifted. A CPU generator gives the same on any device."""
    source = device if generator is None else generator.device
    return shift_time(torch.rand(n, generator=generator, device=source).to(device), shift)


def interpolate(x0, x1, t):
    """The point x_t = t x1 + (1 - t) x0 on the straight path; x0 and x1 (B, ...), t (B,)."""
    t = t.view(-1, *[1] * (x1.ndim - 1))
    return t * x1 + (1 - t) * x0


def drop_condition(cond, p, generator=None):
    """Zero the whole condition of a sample with probability p, so that one network also learns the unconditional flow.

    cond (B, ...). Zeros are the null condition of `guide` (Ho & Salimans, arXiv 2207.12598). p may also be a (B,) bool
    tensor, drawn before: True drops.
    """
    if torch.is_tensor(p):
        return cond * ~p.to(cond.device).view(-1, *[1] * (cond.ndim - 1))
    if not 0 <= p <= 1:
        raise ValueError(f"the probability of dropping a condition must lie in [0, 1], not {p}")
    if p == 0:
        return cond
    source = cond.device if generator is None else generator.device
    keep = torch.rand(len(cond), generator=generator, device=source) >= p  # (B,)
    return cond * keep.to(cond).view(-1, *[1] * (cond.ndim - 1))


def flow_matching_loss(velocity, x1, cond, shift=1.0, drop=0.1, x0=None, t=None, generator=None):
    """The training loss of each sample, (B,) fp32: mean squared error of the velocity over all dimensions of x1.

    velocity(x_t, t, cond) -> like x1; x1 (B, ...) data; cond (B, ...), or None with drop=0. Noise x0 and times t (B,)
    are drawn unless given: a fixed t measures the loss at one time. Per sample, so that a log can sort it by time. drop is
    what `drop_condition` takes.
    """
    if t is None:
        t = sample_t(len(x1), shift, generator, x1.device)
    if x0 is None:
        source = x1.device if generator is None else generator.device
        x0 = torch.randn(x1.shape, generator=generator, device=source).to(x1.device)
    x0, data = x0.float(), x1.float()  # half precision would round t and the target
    predicted = velocity(interpolate(x0, data, t).to(x1.dtype), t, drop_condition(cond, drop, generator))
    return (predicted.float() - (data - x0)).square().flatten(1).mean(1)


def timesteps(steps, shift=1.0, device=None):
    """The grid of `euler_sample`: steps + 1 times from 0 to 1, (steps + 1,) fp32; uniform, then shifted."""
    if steps < 1:
        raise ValueError(f"sampling needs at least one step, not {steps}")
    return shift_time(torch.arange(steps + 1, dtype=torch.float32, device=device) / steps, shift)


def guided(v_cond, v_null, scale):
    """Classifier-free guidance: from the unconditional velocity through the conditional one and beyond (scale > 1)."""
    return v_null + scale * (v_cond - v_null)


def guide(velocity, cond, null=None, scale=1.0, prepare=None):
    """Fix the condition: velocity(x, t, cond) becomes the guided velocity(x, t) that `euler_sample` integrates.

    cond (B, ...); null, of the same shape or broadcast to it, defaults to zeros as in `drop_condition`. Scale 1 runs
    only cond and scale 0 only null; any other scale runs both as one batch of 2B, [null, cond], the order of the
    official code. `prepare`, if given, is called once on that batch and its result is what velocity receives as
    condition at every step; it is for work that doesn't depend on x and t (NextDiT.cache_condition).
    """
    null = torch.zeros_like(cond) if null is None else null.expand_as(cond)
    both = scale not in (0, 1)
    cond = torch.cat([null, cond]) if both else cond if scale == 1 else null
    if prepare is not None:
        cond = prepare(cond)

    def guided_velocity(x, t):
        if not both:
            return velocity(x, t, cond)
        v_null, v_cond = velocity(torch.cat([x, x]), torch.cat([t, t]), cond).float().chunk(2)
        return guided(v_cond, v_null, scale)
    return guided_velocity


@torch.no_grad()
def euler_sample(velocity, x0, steps, shift=1.0, trajectory=None):
    """Integrate dx/dt = velocity(x, t) from noise x0 (B, ...) at t = 0 to data at t = 1 in `steps` Euler steps.

    velocity sees x in x0's dtype and t as (B,) fp32; the state itself stays in fp32, where many small steps add up
    exactly. Returns x1 in x0's dtype. A list given as `trajectory` receives all steps + 1 states, noise and result too.
    """
    times = timesteps(steps, shift, x0.device)  # (steps + 1,)
    x = x0.float()
    for i in range(steps):
        if trajectory is not None:
            trajectory.append(x.to(x0.dtype))
        v = velocity(x.to(x0.dtype), times[i].expand(len(x)))
        x = x + (times[i + 1] - times[i]) * v.float()
    if trajectory is not None:
        trajectory.append(x.to(x0.dtype))
    return x.to(x0.dtype)
