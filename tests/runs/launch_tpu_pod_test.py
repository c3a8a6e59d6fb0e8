"""launch.tpu_pod: its calls of gcloud, and the scripts of a host."""

import os
import re
import subprocess
import time

from absl.testing import absltest, parameterized
from launchers import POD, SLICE, LaunchTest, launch

from launch import common, tpu_pod


class TpuPodTest(LaunchTest):
  def gcloud(self, *states):
    """A gcloud that notes its calls and describes one state after another."""
    (self.folder / "states").write_text("".join(f"{s}\n" for s in states))
    self.client(
      "gcloud",
      'echo "$@" >> calls\n'
      '[ "$4" = describe ] || exit 0\n'
      "state=$(head -n 1 states)\n"
      "sed -i 1d states\n"
      '[ "$state" = none ] && exit 1\n'
      'echo "$state"',
    )
    self.client("git", 'echo git "$@" >> calls')
    self.enterContext(absltest.mock.patch.object(tpu_pod, "_POLL_SECONDS", 0))
    return f"{self.folder}/bin:{os.environ['PATH']}"

  def calls(self):
    lines = (self.folder / "calls").read_text().splitlines()
    return [
      "git" if line.startswith("git") else line.split()[3] for line in lines
    ]

  def test_create_waits(self):
    path = self.gcloud("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    code, out, _ = launch(
      "tpu_pod", "create", *SLICE, "--spot", command=[], path=path
    )
    self.assertEqual(code, 0)
    self.assertEqual(out, "pod: WAITING_FOR_RESOURCES\npod: PROVISIONING\n")
    self.assertEqual(self.calls(), ["create"] + ["describe"] * 3)

  def test_create_that_fails(self):
    code, _, err = launch(
      "tpu_pod", "create", *SLICE, command=[], path=self.gcloud("FAILED")
    )
    self.assertEqual(code, 1)
    self.assertIn("pod: the slice is FAILED, not ACTIVE; why: gcloud comp", err)

  @parameterized.parameters(
    *("v4-8", "v4-64", "v4-128", "v4-384", "v4-8192", "v5litepod-1"),
    *("v5litepod-256", "v5p-16", "v5p-640", "v5p-12288", "v6e-4", "v6e-256"),
  )
  def test_sizes_that_exist(self, accelerator):
    flags = [*POD, f"--accelerator={accelerator}", "--dry-run"]
    code, out, err = launch("tpu_pod", "create", *flags, command=[])
    self.assertEqual((code, err), (0, ""))
    self.assertIn(f" --accelerator-type={accelerator} ", out)

  def test_create_passes_flags_on(self):
    flags = ["--also=--reserved", "--also=--network=mine"]
    _, out, _ = launch(
      "tpu_pod", "create", *SLICE, *flags, "--dry-run", command=[]
    )
    self.assertIn(" --reserved --network=mine\n", out)

  def test_a_client_that_fails(self):
    self.client("gcloud", "exit 3")
    code, _, err = launch(
      "tpu_pod", "stop", *POD, command=[], path=f"{self.folder}/bin"
    )
    self.assertEqual(code, 1)
    self.assertIn(
      "gcloud compute tpus tpu-vm ssh ... failed with exit cod", err
    )

  @parameterized.parameters(
    (
      ["SUSPENDED", "ACTIVE"],
      "describe delete create describe git scp ssh scp ssh",
    ),
    (["none", "ACTIVE"], "describe create describe git scp ssh scp ssh"),
    (["PROVISIONING", "ACTIVE"], "describe describe git scp ssh scp ssh"),
    (["ACTIVE"], "describe scp ssh"),
  )
  def test_resume_does_what_is_left(self, states, calls):
    path = self.gcloud(*states)
    code, _, err = launch("tpu_pod", "resume", *SLICE, path=path)
    self.assertEqual((code, err), (0, ""))
    self.assertEqual(" ".join(self.calls()), calls)

  def scripts(self, command, *flags):
    """Writes what run sends to a host into a host's home folder."""
    path = self.gcloud()
    launch("tpu_pod", "run", *POD, *flags, command=command, path=path)
    home = self.folder / "home"
    (home / "aoarm_jax").mkdir(parents=True)
    for script in (self.folder / common.FOLDER).iterdir():
      script.rename(home / script.name)
    return home

  def on_host(self, home, line):
    return subprocess.run(
      ["bash", "-c", line],
      cwd=home,
      env=os.environ | {"HOME": str(home)},
      capture_output=True,
      text=True,
    )

  def wait_for(self, home, text):
    deadline = time.monotonic() + 10
    log = home / "run.log"
    while not log.exists() or text not in log.read_text():
      self.assertLess(time.monotonic(), deadline, text)
      time.sleep(0.05)
    return log.read_text()

  def test_a_host_starts_the_command_again(self):
    toy = (
      "n=$(cat n); echo $((n + 1)) > n; echo n $n; "
      "[ $n = 3 ] && kill -ABRT $$; codes=(75 76 14 0 2); exit ${codes[n]}"
    )
    home = self.scripts(["bash", "-c", toy])
    (home / "aoarm_jax" / "n").write_text("0")
    self.assertEqual(self.on_host(home, "bash start.sh").returncode, 0)
    log = self.wait_for(home, "exit code 2")
    self.assertRegex(log, r"start 0\nn 0\n.*exit code 75\n.*start 1\nn 1\n")
    codes = re.findall(r"exit code (\d+)", log)
    self.assertEqual(codes, ["75", "76", "14", "134", "2"])

  def test_a_host_runs_one_command_and_stops_it(self):
    toy = "trap 'exit 75' TERM; echo up; while :; do sleep 0.05; done"
    home = self.scripts(["bash", "-c", toy])
    self.on_host(home, "bash start.sh")
    self.wait_for(home, "up")
    (home / "next.sh").write_text("")
    second = self.on_host(home, "bash start.sh")
    self.assertEqual(second.returncode, 1)
    self.assertIn("a command is running", second.stdout)
    self.on_host(home, tpu_pod._STOP)
    self.assertNotIn("start 1", self.wait_for(home, "exit code 75"))

  def test_a_command_that_does_not_stop_is_killed(self):
    toy = "trap '' TERM; echo up; while :; do sleep 0.05; done"
    home = self.scripts(["bash", "-c", toy])
    self.on_host(home, "bash start.sh")
    self.wait_for(home, "up")
    self.on_host(home, tpu_pod._STOP.replace("300", "0.2"))
    self.assertNotIn("start 1", self.wait_for(home, "exit code 137"))


if __name__ == "__main__":
  absltest.main()
