// SPDX-License-Identifier: GPL-2.0
/*
 * The kernel side of the userfaultfd RFC API of March 2015, v1 and v2, beside
 * the 32-byte struct uffd_msg that mainline speaks.
 *
 * Not a translation unit: fs/userfaultfd.c includes it just before
 * userfaultfd_read(), because it needs that file's statics. bench/lab/hook.py
 * adds the include and the two calls.
 *
 * Two spare bits of ctx->features hold the format. Mainline refuses them from
 * user space, a fork copies them to the child's context, and a context without
 * them takes mainline's paths only, its fdinfo included.
 */
#include <linux/moduleparam.h>

#define UFFD_RFC_API_V2		0xABULL
#define UFFD_RFC_V1		(1u << 29)
#define UFFD_RFC_V2		(1u << 30)
#define UFFD_RFC_FORMATS	(UFFD_RFC_V1 | UFFD_RFC_V2)

/* In an address: bits of the fault. In the answer to UFFDIO_API: of the API. */
#define UFFD_RFC_BIT_WRITE	0x1ULL
#define UFFD_RFC_BIT_WP		0x2ULL

#define UFFD_RFC_PAGEFAULT	1
#define UFFD_RFC_FORK		2
/* Bit type-1 says that the type is reported; the RFC shifts these by 12. */
#define UFFD_RFC_V2_TYPES	(1ULL << (UFFD_RFC_PAGEFAULT - 1) | \
				 1ULL << (UFFD_RFC_FORK - 1))

struct uffd_rfc_record {
	__u64 type;
	__u64 arg;
};

/*
 * The RFC's v1 is 0xAA, which mainline now uses for its own format. So v1 has
 * a number of its own until root (or the boot line) gives 0xAA back to it.
 */
static unsigned int v1_api = 0xA1;
module_param(v1_api, uint, 0644);
MODULE_PARM_DESC(v1_api, "value of uffdio_api.api that selects RFC v1");

/* The format that an api value selects, or 0: then mainline decides. */
static unsigned int uffd_rfc_format(__u64 api)
{
	if (api == UFFD_RFC_API_V2)
		return UFFD_RFC_V2;
	return api == READ_ONCE(v1_api) ? UFFD_RFC_V1 : 0;
}

/*
 * UFFDIO_API for v1 and v2; false leaves the api value to mainline. The RFC
 * never looks at what the caller had in bits.
 */
static bool uffd_rfc_api(struct userfaultfd_ctx *ctx, void __user *buf,
			 __u64 api, int *err)
{
	const unsigned int format = uffd_rfc_format(api);
	struct uffdio_api answer = {
		.api = api,
		.features = UFFD_RFC_BIT_WRITE,
		.ioctls = UFFD_API_IOCTLS,
	};
	unsigned int features = UFFD_FEATURE_INITIALIZED | format;

	if (!format)
		return false;
	if (format == UFFD_RFC_V2) {
		answer.features |= UFFD_RFC_V2_TYPES << 12;
		features |= UFFD_FEATURE_EVENT_FORK;
	}
	*err = 0;
	/* A fork event opens the child's memory: as privileged as in mainline. */
	if ((features & UFFD_FEATURE_EVENT_FORK) && !capable(CAP_SYS_PTRACE))
		*err = -EPERM;
	else if (copy_to_user(buf, &answer, sizeof(answer)))
		*err = -EFAULT;
	else if (cmpxchg(&ctx->features, 0, features))
		*err = -EINVAL;		/* this descriptor has its API already */

	if (*err && clear_user(buf, sizeof(answer)))
		*err = -EFAULT;
	return true;
}

static void uffd_rfc_encode(const struct uffd_msg *msg,
			    struct uffd_rfc_record *record)
{
	if (msg->event == UFFD_EVENT_FORK) {
		record->type = UFFD_RFC_FORK;
		record->arg = msg->arg.fork.ufd;
		return;
	}
	WARN_ON_ONCE(msg->event != UFFD_EVENT_PAGEFAULT);
	record->type = UFFD_RFC_PAGEFAULT;
	/* The RFC knows no minor faults: their flag never enters an address. */
	record->arg = msg->arg.pagefault.address & PAGE_MASK;
	if (msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE)
		record->arg |= UFFD_RFC_BIT_WRITE;
	if (msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP)
		record->arg |= UFFD_RFC_BIT_WP;
}

/* The stores and the errors are the RFC's own: put_user, and for v2 -EINVAL. */
static int uffd_rfc_store(char __user *to, const struct uffd_rfc_record *record,
			  bool v2)
{
	if (!v2)
		return put_user(record->arg, (__u64 __user *)to);
	return copy_to_user(to, record, sizeof(*record)) ? -EINVAL : 0;
}

/* As many whole records as fit; only the first is worth waiting for. */
static ssize_t uffd_rfc_read(struct userfaultfd_ctx *ctx, char __user *buf,
			     size_t count, int no_wait, struct inode *inode)
{
	const bool v2 = ctx->features & UFFD_RFC_V2;
	const size_t size = v2 ? sizeof(struct uffd_rfc_record) : sizeof(__u64);
	size_t done = 0;

	if (count < size)
		return -EINVAL;
	while (count - done >= size) {
		struct uffd_rfc_record record;
		struct uffd_msg msg;
		ssize_t err = userfaultfd_ctx_read(ctx, no_wait, &msg, inode);

		if (!err) {
			uffd_rfc_encode(&msg, &record);
			/* A record that cannot be stored is lost, as in mainline. */
			err = uffd_rfc_store(buf + done, &record, v2);
		}
		if (err)
			return done ? done : err;
		done += size;
		no_wait = O_NONBLOCK;
	}
	return done;
}
