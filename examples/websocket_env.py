"""An async environment: a simulator behind a websocket, many connections to a worker, all waiting at the same time.

python -m examples.websocket_env        needs: pip install "aiorl[websocket]"
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import numpy as np
from gymnasium import make, spaces
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

import aiorl

LATENCY_S = 0.005  # what the simulator and the way to it take for a step


async def simulate(client: ServerConnection) -> None:
    """The server's side of one connection: a CartPole that is reset by {"seed": n} and stepped by {"action": n}."""
    env = make("CartPole-v1")
    async for message in client:
        request = json.loads(message)
        if "seed" in request:
            obs, _ = env.reset(seed=request["seed"])
            answer: dict[str, Any] = {"obs": obs.tolist()}
        else:
            await asyncio.sleep(LATENCY_S)
            obs, reward, terminated, truncated, _ = env.step(request["action"])
            answer = {"obs": obs.tolist(), "reward": reward, "terminated": terminated, "truncated": truncated}
        await client.send(json.dumps(answer))


class RemoteCartPole:
    """The client's side is the environment. Its episodes depend on nothing but seed and actions, so runs are exact."""

    def __init__(self, url: str) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._url = url
        self._connection: ClientConnection | None = None

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        answer = await self._ask({"seed": seed})
        return np.array(answer["obs"], np.float32), {}

    async def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        answer = await self._ask({"action": int(action)})
        return np.array(answer["obs"], np.float32), answer["reward"], answer["terminated"], answer["truncated"], {}

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._connection is None:  # not in __init__: only from here on is there an event loop
            self._connection = await connect(self._url)
        await self._connection.send(json.dumps(request))
        return json.loads(await self._connection.recv())

    async def close(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                await self._connection.close()


async def main(total_steps: int = 20_000, envs: int = 32) -> aiorl.Result:
    async with serve(simulate, "127.0.0.1", 0) as server:  # here in the same process; anywhere else in earnest
        port = server.sockets[0].getsockname()[1]
        config = aiorl.Config(
            env="examples.websocket_env:RemoteCartPole", env_kwargs={"url": f"ws://127.0.0.1:{port}"},
            total_steps=total_steps, envs=envs, workers=1, eval_every=0,
        )  # fmt: skip
        result = await aiorl.train(config)
        print(f"{result.env_steps_per_second:.0f} env steps/s; one at a time at most {1 / LATENCY_S:.0f}")
        return result


if __name__ == "__main__":
    asyncio.run(main())
