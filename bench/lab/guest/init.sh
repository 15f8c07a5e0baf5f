#!/bin/sh
# PID 1 of the lab's guest. Run by the kernel from the host's own root, which it
# has mounted read-only over 9p; needs nothing but sh, mount and pivot_root.
# Leaves its answers as files in the run folder (a second, writable 9p share),
# so that console output can never mix with them.

power_off() {
	sync
	echo o >/proc/sysrq-trigger
	while :; do sleep 60; done
}

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# A writable root: what the job writes beside its results goes to memory.
mount -t tmpfs -o mode=755 lab /mnt &&
	mkdir /mnt/upper /mnt/scratch /mnt/root &&
	mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/scratch lab /mnt/root &&
	cd /mnt/root &&
	mount -t proc proc proc &&
	mount -t sysfs sysfs sys &&
	mount -t devtmpfs dev dev &&
	mount -t tmpfs -o mode=755 run run &&
	mkdir -p dev/pts dev/shm run/lab run/tmp &&
	chmod 1777 run/tmp &&
	mount -t devpts devpts dev/pts &&
	mount -t tmpfs -o mode=1777 shm dev/shm &&
	mount -t 9p -o trans=virtio,version=9p2000.L,cache=none,msize=262144 lab-run run/lab &&
	mkdir -p old &&
	pivot_root . old &&
	cd / ||
	echo "lab: the guest's root could not be set up"

mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
ip link set lo up 2>/dev/null
ln -s /proc/self/fd /dev/fd

uname -srvm >/run/lab/uname
cat /proc/cmdline >/run/lab/cmdline
echo "lab: job starts"
: >/run/lab/started
sh /run/lab/job.sh </dev/null >>/run/lab/stdout 2>>/run/lab/stderr
echo $? >/run/lab/status.new && mv /run/lab/status.new /run/lab/status
echo "lab: job ended"
power_off
