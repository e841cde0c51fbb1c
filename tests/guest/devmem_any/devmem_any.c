// SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0
/*
 * While this module is loaded, /dev/mem may map any page, as on a kernel built without CONFIG_STRICT_DEVMEM: a return
 * probe has devmem_is_allowed() say yes. For throw-away test guests, and nothing else.
 */
#include <linux/kprobes.h>
#include <linux/module.h>

static int say_yes(struct kretprobe_instance *instance, struct pt_regs *registers)
{
	regs_set_return_value(registers, 1);
	return 0;
}

static struct kretprobe probe = {
	.kp.symbol_name = "devmem_is_allowed",
	.handler = say_yes,
	.maxactive = 16,
};

static int __init load(void)
{
	return register_kretprobe(&probe);
}

static void __exit unload(void)
{
	unregister_kretprobe(&probe);
}

module_init(load);
module_exit(unload);
MODULE_DESCRIPTION("Test guests: /dev/mem maps any page");
MODULE_LICENSE("GPL");
