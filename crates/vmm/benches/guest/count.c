/* A plugin for QEMU's CPU emulation: how often each block of instructions was run. scripts/bench --profile compiles it.
 *
 * Writes a line `ADDRESS INSTRUCTIONS TIMES` (the first hexadecimal) for each block to the file of its argument `out=FILE` when the
 * machine ends. The declarations are what it uses of QEMU's plugin interface, version 7: no package has its header. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct qemu_plugin_tb;
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
extern void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*call)(struct qemu_plugin_tb *tb, void *data), void *data);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, void (*call)(unsigned cpu, void *data), int registers,
                                                 void *data);
extern void qemu_plugin_register_atexit_cb(uint64_t id, void (*call)(void *data), void *data);

int qemu_plugin_version = 7;

struct block {
    uint64_t address, instructions, times;
    struct block *next;
};

enum { BUCKETS = 1 << 18 };
static struct block *blocks[BUCKETS];
static const char *out;

static void executed(unsigned cpu, void *data)
{
    (void)cpu;
    ((struct block *)data)->times++;
}

/* The same block is translated again and again. */
static void translated(struct qemu_plugin_tb *tb, void *data)
{
    (void)data;
    uint64_t address = qemu_plugin_tb_vaddr(tb), instructions = qemu_plugin_tb_n_insns(tb);
    struct block **bucket = &blocks[(address ^ address >> 18 ^ instructions * 7919) % BUCKETS], *block = *bucket;
    while (block && (block->address != address || block->instructions != instructions))
        block = block->next;
    if (!block) {
        block = calloc(1, sizeof *block);
        if (!block)
            abort();
        *block = (struct block){.address = address, .instructions = instructions, .next = *bucket};
        *bucket = block;
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, 0, block);
}

static void ended(void *data)
{
    (void)data;
    FILE *file = fopen(out, "w");
    if (!file) {
        perror(out);
        return;
    }
    for (int i = 0; i < BUCKETS; i++)
        for (struct block *block = blocks[i]; block; block = block->next)
            if (block->times)
                fprintf(file, "%lx %lu %lu\n", block->address, block->instructions, block->times);
    if (fclose(file))
        perror(out);
}

int qemu_plugin_install(uint64_t id, const void *info, int count, char **arguments)
{
    (void)info;
    for (int i = 0; i < count; i++)
        if (!strncmp(arguments[i], "out=", 4))
            out = strdup(arguments[i] + 4);
    if (!out) {
        fputs("out=FILE is missing\n", stderr);
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated, NULL);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
